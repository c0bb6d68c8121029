"""Other packages beside this one, each in an environment of its own; not part of CI."""
