/* Work shared among the threads that torch has: processor.c does it. */
#ifndef CADSURGERY_PARALLEL_H
#define CADSURGERY_PARALLEL_H

typedef void (*share_body)(long begin, long end, void *work);

/* Calls `body` for parts of 0..count, each `grain` long but the last, in any order and at the same time. */
void cadsurgery_share(long count, long grain, share_body body, void *work);

/* How many rows of so many bytes are worth a part of their own. */
static inline __attribute__((unused)) long rows_at_once(long bytes) {
    const long rows = 65536 / (bytes < 1 ? 1 : bytes);
    return rows < 4 ? 4 : rows;
}

#endif
