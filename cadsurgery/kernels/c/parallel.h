/* Share work among the threads of the process; implemented in processor.c. */
#ifndef CADSURGERY_PARALLEL_H
#define CADSURGERY_PARALLEL_H

typedef void (*share_body)(long begin, long end, void *work);

/* Call `body` for parts of 0..count, in parallel and in any order; each part but the last has length `grain`. */
void cadsurgery_share(long count, long grain, share_body body, void *work);

/* A way to share work; returns 0 if it did nothing. */
typedef int share_in_engine(long count, long grain, share_body body, void *work);

/* Let `cadsurgery_share` share by another way in this thread, which does the work alone where the way does nothing; NULL for
 * torch's threads. */
void cadsurgery_share_by(share_in_engine *way);

/* Return how many rows of `bytes` bytes make a part worth sharing. */
static inline __attribute__((unused)) long rows_at_once(long bytes) {
    const long rows = 65536 / (bytes < 1 ? 1 : bytes);
    return rows < 4 ? 4 : rows;
}

#endif
