"""The built-in modules: one specification, one file, named for it. They come through the entry points
`tidings.modules`, as those of outsiders do."""
