"""Small tools: the models table, tiny and large random weights, the crash campaign."""
