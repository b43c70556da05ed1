"""The HTTP server `imagine serve`: many people's pictures from one durable queue.

    settings   what an operator chooses
    store/     jobs, personas, photos, pictures, keys and events in a database, and the files beside them
    worker/    one denoising loop per device, which takes steps of different people's pictures together
    api/       the HTTP routes, which only write to and read from the store
    server     starts and supervises both; ray_replicas does the same on Ray Serve

A job is accepted when it is in the database, and survives the client, the server and the worker. Workers claim jobs
with a lease and an attempt number. The attempt number fences results: only the worker that holds the current attempt
can finish a job, and pictures are renamed into place before the row that names them is written.
"""
