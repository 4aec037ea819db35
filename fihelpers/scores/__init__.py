"""From a model and examples to class gradients, measures, and stored scores."""
