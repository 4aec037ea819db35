"""How the bundled models and the drawn data are made."""
