"""An order's life: the steps, the worker that drives them, and the watch over running guests."""
