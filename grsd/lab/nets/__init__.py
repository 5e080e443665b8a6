"""Networks: small nets with explicit seeds, families of architectures, stock models by name, planted properties."""
