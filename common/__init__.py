"""What the stages share and nothing else: noise levels, cache, model loading, configuration, errors."""
