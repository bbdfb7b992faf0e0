"""The model classes that the library knows by name."""
