def fetch_sources(names):
    return {}
