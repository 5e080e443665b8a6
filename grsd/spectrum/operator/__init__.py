"""The operator M = J Jᵀ: how parameters enter, blocks of K, and products that use them."""
