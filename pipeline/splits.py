"""Who may learn from what: blocks of time, sensors held out, trajectories held out, and the frozen evaluation cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, model_validator

from pipeline.params import Section
from pipeline.sensors import CONTEXT, GAP, HELD_TEST, HELD_VALIDATION, SPLITS, TEST, TRAIN, VALIDATION


class TimeBlocks(Section):
    """Each trajectory is cut in time: train, gap, validation, gap, test."""

    validation: float = Field(gt=0, lt=1)  # share of the frames
    test: float = Field(gt=0, lt=1)
    gap: int = Field(ge=0)  # frames; at least the longest context plus the longest lead, so that no two splits share a frame


class HeldOut(Section):
    """Fixed sensors (or grid cells) that are never context: named, or so many drawn with the seed, spread over the area."""

    validation: int | tuple[str, ...] = 0
    test: int | tuple[str, ...] = 0
    least: int = Field(default=1, ge=1)  # a sensor is only drawn if it reported in at least so many frames

    @model_validator(mode="after")
    def _apart(self) -> HeldOut:
        if isinstance(self.validation, tuple) and isinstance(self.test, tuple) and (both := set(self.validation) & set(self.test)):
            raise ValueError(f"{', '.join(sorted(both))} is named for validation and for test")
        return self


class Cases(Section):
    """Where evaluation starts, frozen in the dataset so that all models answer the same questions."""

    stride: int = Field(default=1, ge=1)  # frames between cases
    horizon: int = Field(
        default=0, ge=0
    )  # frames that must follow a case in its split, so that all leads up to it are scored on the same cases
    history: int = Field(default=0, ge=0)  # frames that must precede a case in its split; one of them or its own must show something
    most: int | None = Field(default=None, ge=1)  # a split with more cases is thinned evenly
    block: int | None = Field(default=None, ge=1)  # frames of a bootstrap block; None: a block is a trajectory


def time_blocks(n_frames: int, blocks: TimeBlocks, where: str) -> np.ndarray:
    """Split code [n_frames] of one trajectory. The gaps are taken from the end of the earlier block."""
    test = n_frames - round(blocks.test * n_frames)
    validation = test - round(blocks.validation * n_frames)
    split = np.full(n_frames, GAP, np.int8)
    split[: max(0, validation - blocks.gap)] = TRAIN
    split[validation : max(validation, test - blocks.gap)] = VALIDATION
    split[test:] = TEST
    short = [name for name, code in SPLITS.items() if not (split == code).any()]
    if short:
        shares = {"train": 1 - blocks.validation - blocks.test, "validation": blocks.validation, "test": blocks.test}
        smallest = min(shares["train"], shares["validation"])
        least = max((blocks.gap + 1.5) / smallest, 1 / blocks.test) if smallest > 0 else np.inf
        needed = f"at least {int(np.ceil(least))}" if np.isfinite(least) else "validation + test below 1, and more"
        raise ValueError(
            f"{where} has {n_frames} frames, too few for a split with gaps of {blocks.gap}: nothing is left for {', '.join(short)}; "
            f"needed: {needed} frames, or a smaller gap"
        )
    return split


def by_role(roles: Sequence[object], frames: np.ndarray) -> np.ndarray:
    """Split code of every frame from the role of its trajectory ("train" | "validation" | "test"), with `frames` [R] frames each."""
    unknown = sorted({str(role) for role in roles} - set(SPLITS))
    if unknown:
        raise ValueError(f"coordinate role holds {', '.join(unknown)}: expected {', '.join(SPLITS)}")
    return np.repeat(np.array([SPLITS[str(role)] for role in roles], np.int8), frames)


def held_out(ids: Sequence[str], position: np.ndarray, frames: np.ndarray, held: HeldOut, seed: int) -> np.ndarray:
    """Role [K] of each fixed sensor from its id, position [K,2] in km and number of frames [K] with a report."""
    role = np.full(len(ids), CONTEXT, np.int8)
    rng = np.random.default_rng([seed, 1])
    for name, code in (("test", HELD_TEST), ("validation", HELD_VALIDATION)):
        wanted = getattr(held, name)
        if isinstance(wanted, int):
            free = np.flatnonzero((role == CONTEXT) & (frames >= held.least))
            if wanted > len(free):
                raise ValueError(
                    f"held_out.{name}: {wanted} sensors are to be held out, but only {len(free)} of {len(ids)} are left "
                    f"that reported in at least {held.least} frames"
                )
            role[free[spread(position[free], wanted, rng)]] = code
            continue
        unknown = sorted(set(wanted) - set(ids))
        if unknown:
            raise ValueError(f"held_out.{name}: no sensor {', '.join(unknown)}; there are {', '.join(ids)}")
        role[[list(ids).index(one) for one in wanted]] = code
    return role


def spread(position: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` indices of points [K,D], spread over the area: halved along their longer side into `count` groups, one drawn of each."""

    def halve(group: np.ndarray, parts: int) -> list[int]:
        if parts == 0:
            return []
        if parts == 1:
            return [int(rng.choice(group))]
        axis = int(np.argmax(np.ptp(position[group], axis=0)))
        ordered = group[np.argsort(position[group, axis], kind="stable")]
        left = parts // 2
        cut = round(len(ordered) * left / parts)
        return halve(ordered[:cut], left) + halve(ordered[cut:], parts - left)

    return np.array(sorted(halve(np.arange(len(position)), count)), np.int64)


def cases(split: np.ndarray, frame_start: np.ndarray, visible: np.ndarray, settings: Cases) -> dict[str, np.ndarray]:
    """Arrays cases/frame, cases/split, cases/block from split codes [M], trajectory offsets [R+1] and numbers of visible observations [M].

    A case starts every `stride` frames from the start of a stretch of its split, after its `history`, where something can be seen. Blocks
    are numbered through all stretches, and never shared by two.
    """
    owner = np.repeat(np.arange(len(frame_start) - 1), np.diff(frame_start))
    edge = np.flatnonzero((np.diff(owner) != 0) | (np.diff(split) != 0)) + 1
    found: list[tuple[int, int, int]] = []
    block = 0
    for first, last in zip([0, *edge], [*edge, len(split)], strict=True):
        if split[first] not in (VALIDATION, TEST):
            continue
        length = settings.block or last - first
        starts = range(first + settings.history, last - settings.horizon, settings.stride)
        shown = [frame for frame in starts if visible[frame - settings.history : frame + 1].any()]
        found += [(frame, split[first], block + (frame - first) // length) for frame in shown]
        block += -(-(last - first) // length)
    table = np.array(found, np.int64).reshape(-1, 3)
    kept = []
    for code in (VALIDATION, TEST):
        number = np.flatnonzero(table[:, 1] == code)
        if not len(number):
            name = next(name for name, c in SPLITS.items() if c == code)
            raise ValueError(
                f"the {name} split holds no case: no frame with a visible observation has {settings.history} frames before it and "
                f"{settings.horizon} frames after it in the split of {int((split == code).sum())} frames; lower cases.history or "
                "cases.horizon, or enlarge the split"
            )
        if settings.most and len(number) > settings.most:
            number = number[np.round(np.linspace(0, len(number) - 1, settings.most)).astype(int)]
        kept.append(number)
    table = table[np.sort(np.concatenate(kept))]
    return {"cases/frame": table[:, 0], "cases/split": table[:, 1].astype(np.int8), "cases/block": table[:, 2].astype(np.int32)}
