"""A page for one user: what a model's experts do with a sentence, and what others would do.

``inspector``   translates a sentence and says which experts each piece went to, or is sent to
``server``      HTTP around it: ``page.html`` with its style and script, and JSON
"""
