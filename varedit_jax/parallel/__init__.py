"""Devices: meshes, sharding of arrays, several processes, topologies for ahead-of-time compilation."""
