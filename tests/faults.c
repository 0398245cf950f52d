/* Makes chosen calls of a program fail: built by test_faults.py and loaded with LD_PRELOAD.

   A call fails if its name is one of `calls`, its path fits `pattern` (fnmatch, "*" also spans
   "/"), and it is the `first` to the `last` of the calls of which both is so. One that writes
   has then written half of its bytes, as a disk that fails on the way. `faults_arm` sets what
   fails, or the variables FAULT_PATTERN, FAULT_CALLS, FAULT_ERRNO, FAULT_FIRST and FAULT_LAST.
   `faults_trace` names a descriptor that gets a line for each call whose path fits. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char armed_pattern[PATH_MAX], armed_calls[256];
static int armed, armed_errno, trace = -1;
static long armed_first, armed_last;
static atomic_long seen;

void faults_arm(const char *pattern, const char *calls, int error, long first, long last) {
    snprintf(armed_pattern, sizeof armed_pattern, "%s", pattern);
    snprintf(armed_calls, sizeof armed_calls, " %s ", calls);
    armed_errno = error;
    armed_first = first;
    armed_last = last;
    seen = 0;
    armed = 1;
}

void faults_disarm(void) { armed = 0; }
void faults_trace(int descriptor) { trace = descriptor; }

/* How many calls have come that were to be counted. */
long faults_seen(void) { return seen; }

__attribute__((constructor)) static void arm_from_environment(void) {
    const char *pattern = getenv("FAULT_PATTERN");
    if (pattern)
        faults_arm(pattern, getenv("FAULT_CALLS"), atoi(getenv("FAULT_ERRNO")),
                   atol(getenv("FAULT_FIRST")), atol(getenv("FAULT_LAST")));
}

static int fails(const char *call, const char *path) {
    char name[64];
    if (!armed || !path || fnmatch(armed_pattern, path, 0))
        return 0;
    if (trace >= 0)
        dprintf(trace, "%s %s\n", call, path);
    snprintf(name, sizeof name, " %s ", call);
    if (!strstr(armed_calls, name))
        return 0;
    long number = ++seen;
    if (number < armed_first || number > armed_last)
        return 0;
    errno = armed_errno;
    return 1;
}

/* The path of an open file; 0 if it has none. */
static int find_path(int descriptor, char path[PATH_MAX]) {
    char link[64];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    errno = before;
    path[length < 0 ? 0 : length] = 0;
    return length >= 0;
}

static int fails_on(const char *call, int descriptor) {
    char path[PATH_MAX];
    return armed && find_path(descriptor, path) && fails(call, path);
}

/* The same for a name in a directory that is open. */
static int fails_in(const char *call, int directory, const char *name) {
    char path[PATH_MAX], whole[2 * PATH_MAX];
    if (!armed || name[0] == '/' || directory == AT_FDCWD || !find_path(directory, path))
        return fails(call, name);
    snprintf(whole, sizeof whole, "%s/%s", path, name);
    return fails(call, whole);
}

/* What is to be failed, by its own name; `real` is the function that would have been called. */
#define INSTEAD(type, name, ...)                           \
    type name(__VA_ARGS__) {                               \
        static type (*real)(__VA_ARGS__);                  \
        if (!real)                                         \
            real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);

#define FAIL_ON_DESCRIPTOR(call)    \
    if (fails_on(call, descriptor)) \
        return -1;

#define FAIL_HALF_WAY(call, half)     \
    if (fails_on(call, descriptor)) { \
        int error = errno;            \
        ssize_t written = half;       \
        (void)written;                \
        errno = error;                \
        return -1;                    \
    }

INSTEAD(ssize_t, write, int descriptor, const void *bytes, size_t size)
    FAIL_HALF_WAY("write", real(descriptor, bytes, size / 2))
    return real(descriptor, bytes, size);
}

INSTEAD(ssize_t, pwrite, int descriptor, const void *bytes, size_t size, off_t at)
    FAIL_HALF_WAY("write", real(descriptor, bytes, size / 2, at))
    return real(descriptor, bytes, size, at);
}

INSTEAD(ssize_t, pwrite64, int descriptor, const void *bytes, size_t size, off64_t at)
    FAIL_HALF_WAY("write", real(descriptor, bytes, size / 2, at))
    return real(descriptor, bytes, size, at);
}

INSTEAD(ssize_t, read, int descriptor, void *bytes, size_t size)
    FAIL_ON_DESCRIPTOR("read")
    return real(descriptor, bytes, size);
}

INSTEAD(ssize_t, pread64, int descriptor, void *bytes, size_t size, off64_t at)
    FAIL_ON_DESCRIPTOR("read")
    return real(descriptor, bytes, size, at);
}

INSTEAD(int, fsync, int descriptor) FAIL_ON_DESCRIPTOR("sync") return real(descriptor); }
INSTEAD(int, fdatasync, int descriptor) FAIL_ON_DESCRIPTOR("sync") return real(descriptor); }

INSTEAD(int, ftruncate, int descriptor, off_t size)
    FAIL_ON_DESCRIPTOR("truncate") return real(descriptor, size); }
INSTEAD(int, ftruncate64, int descriptor, off64_t size)
    FAIL_ON_DESCRIPTOR("truncate") return real(descriptor, size); }

INSTEAD(int, rename, const char *from, const char *to)
    return fails("rename", to) ? -1 : real(from, to); }
INSTEAD(int, unlink, const char *path) return fails("unlink", path) ? -1 : real(path); }
INSTEAD(int, mkdir, const char *path, mode_t mode)
    return fails("mkdir", path) ? -1 : real(path, mode); }
INSTEAD(int, rmdir, const char *path) return fails("rmdir", path) ? -1 : real(path); }
INSTEAD(int, symlink, const char *to, const char *path)
    return fails("link", path) ? -1 : real(to, path); }

/* As a whole tree is deleted: by names within directories that are open. */
INSTEAD(int, unlinkat, int directory, const char *name, int flags)
    return fails_in(flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, name)
        ? -1 : real(directory, name, flags); }

#define MODE(flags, mode)               \
    mode_t mode = 0;                    \
    if (flags & O_CREAT) {              \
        va_list rest;                   \
        va_start(rest, flags);          \
        mode = va_arg(rest, mode_t);    \
        va_end(rest);                   \
    }

INSTEAD(int, open, const char *path, int flags, ...)
    MODE(flags, mode) return fails("open", path) ? -1 : real(path, flags, mode); }
INSTEAD(int, open64, const char *path, int flags, ...)
    MODE(flags, mode) return fails("open", path) ? -1 : real(path, flags, mode); }
INSTEAD(int, openat, int directory, const char *name, int flags, ...)
    MODE(flags, mode)
    return fails_in("open", directory, name) ? -1 : real(directory, name, flags, mode); }
INSTEAD(int, openat64, int directory, const char *name, int flags, ...)
    MODE(flags, mode)
    return fails_in("open", directory, name) ? -1 : real(directory, name, flags, mode); }
