"""Weights that are factorised while they are trained: from random weights, or from a trained model's.

A file with a leading underscore is the engine; every other file is a method, and its name is the method's.
"""
