"""The library of adapters: where they come from and what becomes of them."""
