/* Calls of the system that a test may refuse: the linker puts these functions in the place of the system's
 * (Makefile: REFUSED). Include it once in a program, behind #define _GNU_SOURCE. */
#ifndef REFUSED_H
#define REFUSED_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_int asked, fails_at;      /* how many requests there were; the one that fails, 0: none */
static atomic_bool for_good;            /* and all behind it */
static atomic_bool spared;              /* the one that failed may: there is another way */
static atomic_bool of_a_file;           /* it was of a file, which an error is to name */
static atomic_int blocks, maps, threads, files; /* that are held */

static bool refused(void) {
    const int n = atomic_fetch_add(&asked, 1) + 1, at = atomic_load(&fails_at);
    return at && (n == at || (n > at && atomic_load(&for_good)));
}
static bool file_refused(void) {
    const bool now = refused();
    if (now) atomic_store(&of_a_file, true);
    return now;
}

#define WRAP(type, name, parameters, ...) \
    type __real_##name parameters;        \
    type __wrap_##name parameters;        \
    type __wrap_##name parameters

static void *counted(void *block) { return atomic_fetch_add(&blocks, block != NULL), block; }
WRAP(void *, malloc, (size_t n)) { return refused() ? NULL : counted(__real_malloc(n)); }
WRAP(void *, calloc, (size_t n, size_t size)) { return refused() ? NULL : counted(__real_calloc(n, size)); }
WRAP(void *, realloc, (void *old, size_t n)) {
    if (refused()) return NULL;
    void *now = __real_realloc(old, n);
    if (!old) counted(now);
    return now;
}
WRAP(void, free, (void *block)) {
    atomic_fetch_sub(&blocks, block != NULL);
    __real_free(block);
}
WRAP(void *, mmap, (void *at, size_t n, int protection, int flags, int fd, off_t offset)) {
    if (refused()) return errno = ENOMEM, MAP_FAILED;
    void *map = __real_mmap(at, n, protection, flags, fd, offset);
    atomic_fetch_add(&maps, map != MAP_FAILED && !(flags & MAP_FIXED));
    return map;
}
WRAP(int, munmap, (void *at, size_t n)) {
    atomic_fetch_sub(&maps, 1);
    return __real_munmap(at, n);
}
WRAP(int, pthread_create, (pthread_t * t, const pthread_attr_t *a, void *(*work)(void *), void *arg)) {
    if (refused()) return EAGAIN;
    const int failed = __real_pthread_create(t, a, work, arg);
    atomic_fetch_add(&threads, !failed);
    return failed;
}
WRAP(int, pthread_join, (pthread_t t, void **result)) {
    atomic_fetch_sub(&threads, 1);
    return __real_pthread_join(t, result);
}
int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...) {
    if (file_refused()) {
        if (!atomic_load(&for_good))
            atomic_store(&spared, flags & O_DIRECT); /* then it is read through the page cache */
        return errno = EMFILE, -1;
    }
    const int fd = __real_open(path, flags);
    atomic_fetch_add(&files, fd >= 0);
    return fd;
}
WRAP(int, close, (int fd)) {
    atomic_fetch_sub(&files, 1);
    return __real_close(fd);
}
WRAP(int, fstat, (int fd, struct stat *info)) { return file_refused() ? (errno = EIO, -1) : __real_fstat(fd, info); }
WRAP(ssize_t, pread, (int fd, void *to, size_t n, off_t at)) {
    return file_refused() ? (errno = EIO, -1) : __real_pread(fd, to, n, at);
}

static int held(void) {
    return atomic_load(&blocks) + atomic_load(&maps) + atomic_load(&threads) + atomic_load(&files);
}

#endif
