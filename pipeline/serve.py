"""Serve what is published, on this machine: `python -m pipeline.serve --published data/published --port 8000`.

    /                          the index page; every page below it by the same relative links as on disk
    /maps/KEY /reports/KEY /quality/KEY   the latest pages
    /data/KEY/...              the latest published cube as Zarr v3: `xarray.open_zarr("http://localhost:8000/data/KEY")`
    /data/KEY@TAG/...          the cube as it was when the run of that tag was published, which never changes
    /health                    last run, data age and refusals of every dataset as JSON

Zarr keys are answered straight from the Icechunk branch, so a new commit is seen by the next request. Errors are RFC 9457 problems.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from zarr.core.buffer import default_buffer_prototype

from pipeline import publish, utc

_PAGES = {"maps": "map", "reports": "report", "quality": "quality"}


def app(published: Path) -> FastAPI:
    """The application over a folder of publications, which may still be empty."""
    service = FastAPI(title="Fieldcast", docs_url=None, redoc_url=None)  # their pages need a content network
    repositories: dict[str, Any] = {}

    @service.exception_handler(HTTPException)
    async def problem(request: Request, error: HTTPException) -> JSONResponse:
        content = {"type": "about:blank", "title": "Not found" if error.status_code == 404 else "Error", "status": error.status_code}
        content |= {"detail": str(error.detail), "instance": request.url.path}
        return JSONResponse(content, error.status_code, media_type="application/problem+json")

    @service.get("/health")
    def health() -> dict[str, Any]:
        now = datetime.now(UTC)
        return {"status": "ok", "time": utc.text(now), "datasets": [_health(entry, now) for entry in publish.state(published)]}

    @service.get("/data/{key}/{path:path}")
    async def data(key: str, path: str) -> Response:
        key, _, tag = key.partition("@")
        folder = published / key / "forecast.icechunk"
        if not folder.is_dir() or folder.parent.parent.resolve() != published.resolve():
            raise HTTPException(404, f"no dataset {key!r} is published; /health lists what is")
        if key not in repositories:
            repositories[key] = publish.open_repository(folder)
        if tag and tag not in await repositories[key].list_tags_async():
            raise HTTPException(404, f"no run {tag!r} of {key!r} is published")
        session = await repositories[key].readonly_session_async(None if tag else publish.BRANCH, tag=tag or None)
        content = await _root(session) if path == "zarr.json" else await _get(session, path)
        if content is None:
            raise HTTPException(404, f"{path!r} is not in the published cube {key!r}")
        headers = {"ETag": f'"{session.snapshot_id}"', "Cache-Control": "no-cache"}
        kind = "application/json" if path.endswith("zarr.json") else "application/octet-stream"
        return Response(content, media_type=kind, headers=headers)

    @service.get("/{kind}/{key}")
    def page(kind: str, key: str) -> FileResponse:
        found = published / key / "latest" / f"{_PAGES.get(kind, '')}.html"
        if kind not in _PAGES or key not in {entry["key"] for entry in publish.state(published)} or not found.exists():
            raise HTTPException(404, f"no page /{kind}/{key}; / lists what is published")
        return FileResponse(found, headers={"Cache-Control": "no-cache"})

    published.mkdir(parents=True, exist_ok=True)
    if not (published / "index.html").exists():
        publish.write_index(published)
    service.mount("/", StaticFiles(directory=published, html=True))
    return service


async def _get(session: Any, path: str) -> bytes | None:
    buffer = await session.store.get(path, default_buffer_prototype())
    return None if buffer is None else buffer.to_bytes()


async def _root(session: Any) -> bytes | None:
    """The root's metadata with that of all its members inside: HTTP has no listing, so readers find them here."""
    content = await _get(session, "zarr.json")
    if content is None:
        return None
    members = {}
    async for path in session.store.list():
        if path.endswith("/zarr.json"):
            members[path.removesuffix("/zarr.json")] = json.loads(await _get(session, path) or b"null")
    root = json.loads(content)
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": dict(sorted(members.items()))}
    return json.dumps(root).encode()


def _health(entry: dict[str, Any], now: datetime) -> dict[str, Any]:
    receipt, refused = entry["receipt"], entry["refused"]
    init = receipt["runs"][-1]["init_time"] if receipt else None
    return {
        "key": entry["key"],
        "model": receipt and receipt["model"],
        "init_time": init,
        "published_at": receipt and receipt["published_at"],
        "data_age_hours": round((now - datetime.fromisoformat(init)).total_seconds() / 3600, 2) if isinstance(init, str) else None,
        "sensors_used": receipt and receipt["runs"][-1]["sensors_used"],
        "sensors_expected": receipt and receipt["runs"][-1]["sensors_expected"],
        "refused": refused and {"at": refused["at"], "reasons": refused["reasons"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=Path("data/published"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    print(f"Fieldcast: http://{options.host}:{options.port}/  (data: /data/KEY, state: /health)", flush=True)
    uvicorn.run(app(options.published), host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
