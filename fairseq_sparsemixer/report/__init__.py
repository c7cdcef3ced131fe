"""One page that shows what trained models do, from the folders of their runs.

===================  ==============================================================================
``gather``           training as plain data: curves, the experts' load
``routing``          runs a model over the test set: which experts take which words and domains
``specialisation``   how much an expert tells of words and domains, and its typical words
``canvas``           styles of arms, legends, SVG for a page
``painter``          what a figure looks like
``drawing``          which figures a page has
``page``             HTML, by ``*.html.j2`` and ``page.css``
``content``          what a page says, from the runs
``build``            ``fairseq-sparsemixer report``
===================  ==============================================================================
"""
