"""Long work on whole models: scoring them on one or many processes, and what it will take."""
