"""What a model costs on hardware one does not have: `jaxlm plan`."""
