"""What the chapters import beside the library, a folder each: their experiments, figures and checks."""
