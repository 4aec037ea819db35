"""Perturbations that test what a score claims. They know scores, not how scores were made."""
