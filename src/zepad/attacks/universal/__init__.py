"""Universal attacks, which craft one perturbation for all images."""
