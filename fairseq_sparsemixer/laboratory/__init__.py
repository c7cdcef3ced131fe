"""How good are the routers' gradients? Estimators against the exact gradient, by enumeration.

``problems``     a batch of tokens whose experts and loss can be evaluated for any choice
``estimators``   the routers, and a few more, as estimators of the router's gradient
``measures``     bias, noise and cosine of an estimator on a problem
``toys``         problems with a formula for the loss; the order of accuracy
``checkpoint``   problems made of a trained model and real sentences
``gradients``    the command line
``plots``        the figures
"""
