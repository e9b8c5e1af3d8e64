"""Tasks: what the commands do with networks, files and folders, for people who call it from Python too.

In come names, paths and options; out go reports that print, write JSON and draw: conversion, benchmark, evaluation of
segmentation and of keypoints, the check of all networks of the libraries.
"""
