"""Few bits a weight: codes that are chosen on what calibration learned."""
