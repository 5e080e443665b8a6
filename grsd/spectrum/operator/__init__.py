"""The operator M = J Jᵀ: how parameters enter, the blocks of K, and the forms that multiply by M."""
