"""The routers, one file for each family of gradient estimators."""
