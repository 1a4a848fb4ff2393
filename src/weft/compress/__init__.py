"""Post-training compression: a trained model's matrices replaced by structured ones that store less.

A file with a leading underscore is the engine; every other file is a method, and its name is the method's.
"""
