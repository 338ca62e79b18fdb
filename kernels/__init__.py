"""Triton kernels, one file per operator: the kernel and its launcher. Imports torch and triton only.

Launchers trust their arguments: fastdynat.ops has checked shapes, dtypes, devices and layouts.
"""
