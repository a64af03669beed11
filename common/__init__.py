"""What the stages share and nothing else: noise schedule, cache, model loading, configuration, errors."""
