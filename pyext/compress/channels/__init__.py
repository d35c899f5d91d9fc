"""Which channels belong together: labels of tensors' elements, walked through an exported graph."""
