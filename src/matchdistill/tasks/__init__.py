"""One module per task: thin Lightning modules around a distiller."""
