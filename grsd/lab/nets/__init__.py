"""Networks: small nets, families of architectures, stock models, planted properties."""
