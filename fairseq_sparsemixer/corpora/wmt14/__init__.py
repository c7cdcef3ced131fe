"""The corpus ``wmt14``: the archives of WMT14 English-German."""
