"""Devices: meshes, which array lies where, several processes, compiling for machines that are not there."""
