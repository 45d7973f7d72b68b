def publish_datasets(o, u):
    return {}
