"""Gates of a whole search: sampling (K1), its backward (K2), balance with Adam (K2b), and the bank that holds them."""
