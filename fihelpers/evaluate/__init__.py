"""How much a perturbation damages: questions, the harness, and the statistics."""
