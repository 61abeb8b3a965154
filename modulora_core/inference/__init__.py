"""Running a model: opening it, generating and evaluating."""
