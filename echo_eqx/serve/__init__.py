"""An HTTP server that speaks: the engine that owns the device, and the endpoints."""
