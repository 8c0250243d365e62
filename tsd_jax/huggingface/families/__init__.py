"""The supported values of `model_type`: networks, fields of config.json, and names."""
