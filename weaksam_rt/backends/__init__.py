"""Ways to run the engine models: behind one protocol, so that the pipeline does not know which."""
