"""How much a perturbation damages: questions, judges of text, the harness, and the statistics."""
