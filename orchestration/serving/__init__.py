"""A registered model at work: on files, on shard sets in parallel, and behind HTTP.

predict.py reads image files; parts.py and predict_sets.py whole sets over Ray Data; app.py is the HTTP service,
replicas.py the Ray Serve deployment behind it. All of them see an image through images.py, ask finder.py, and tell
what was found through found.py.
"""
