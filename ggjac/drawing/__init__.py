"""Charts: `charts` holds them as data, `figures` draws them with matplotlib. Neither depends on a model or a result."""
