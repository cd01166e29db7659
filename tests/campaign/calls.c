/* Counts the calls by which a process changes files below one folder, and lets one of them go wrong.
 *
 * Loaded with LD_PRELOAD, it stands between a process and its C library, so that Python's, Rust's and C++'s writes are
 * all seen. It does nothing until `campaign_arm` is called, and then only in the process that called it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, TEAR, FAIL, FULL, STOP };
enum { GO = 0, HALF = -1 };

static int mode = OFF, error_number = 0, log_to = -1;
static long at = -1, seen = 0;
static pid_t owner = 0;
static char prefix[PATH_MAX];
static size_t prefix_length = 0;

/* What `wanted`: COUNT calls into the open file `log` (or nowhere with -1); KILL before call `number`; TEAR it, half of
 * its bytes written; FAIL it with `error`; FULL: fail it and all after it that take room; or STOP before each. */
void campaign_arm(int wanted, long number, int error, const char *folder, int log) {
    owner = getpid();
    at = number;
    error_number = error;
    log_to = log;
    seen = 0;
    snprintf(prefix, sizeof prefix, "%s", folder);
    prefix_length = strlen(prefix);
    mode = wanted;
}

long campaign_seen(void) { return seen; }

static int below(const char *path) {
    return strncmp(path, prefix, prefix_length) == 0 && (path[prefix_length] == '/' || path[prefix_length] == 0);
}

static int of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return 1;
}

static int at_folder(int folder, const char *name, char *path) {
    if (name == NULL) return 0;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return 1;
    }
    char base[PATH_MAX];
    if (folder == AT_FDCWD ? getcwd(base, sizeof base) == NULL : !of_descriptor(folder, base)) return 0;
    size_t length = strlen(base);
    if (length + strlen(name) + 2 > PATH_MAX) return 0;
    memcpy(path, base, length);
    path[length] = '/';
    strcpy(path + length + 1, name);
    return 1;
}

static int event(const char *kind, const char *path, int takes_room) {
    if (!below(path)) return GO;
    long number = __atomic_fetch_add(&seen, 1, __ATOMIC_SEQ_CST);
    if (log_to >= 0) {
        char line[PATH_MAX + 32];
        int size = snprintf(line, sizeof line, "%s %s\n", kind, path + prefix_length);
        syscall(SYS_write, log_to, line, (size_t)size);
    }
    /* To this thread: the process stands still before this returns. */
    if (mode == STOP) raise(SIGSTOP);
    if (mode == FULL && number >= at && takes_room) return error_number;
    if (number != at) return GO;
    if (mode == KILL) kill(owner, SIGKILL);
    if (mode == TEAR) return HALF;
    if (mode == FAIL) return error_number;
    return GO;
}

static int watched(void) { return mode != OFF && getpid() == owner; }

static int on_descriptor(const char *kind, int descriptor, int takes_room) {
    char path[PATH_MAX];
    if (!watched() || descriptor <= 2 || !of_descriptor(descriptor, path)) return GO;
    return event(kind, path, takes_room);
}

static int on_path(const char *kind, int folder, const char *name, int takes_room) {
    char path[PATH_MAX];
    if (!watched() || !at_folder(folder, name, path)) return GO;
    return event(kind, path, takes_room);
}

#define NEXT(name) ((__typeof__(&name))next(&real_##name, #name))
static void *next(void **kept, const char *name) {
    if (*kept == NULL) *kept = dlsym(RTLD_NEXT, name);
    return *kept;
}

/* For calls that are done or not: what to give back where this one is not to be done. */
#define REFUSE(found) \
    do { \
        int refused = (found); \
        if (refused == HALF) kill(owner, SIGKILL); \
        if (refused > 0) { errno = refused; return -1; } \
    } while (0)

#define OPENS(name, folder) \
    do { \
        int writes = (flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY; \
        mode_t permissions = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            permissions = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        if (writes) REFUSE(on_path("open", folder, path, (flags & O_CREAT) != 0)); \
        PASS_ON(name); \
    } while (0)

static void *real_open, *real_open64, *real_openat, *real_openat64, *real_write, *real_pwrite, *real_pwrite64,
    *real_writev, *real_fsync, *real_fdatasync, *real_ftruncate, *real_ftruncate64, *real_close, *real_rename,
    *real_renameat, *real_renameat2, *real_unlink, *real_unlinkat, *real_rmdir, *real_mkdir, *real_mkdirat,
    *real_chmod, *real_fchmod, *real_fchmodat, *real_link, *real_symlink, *real_truncate, *real_sendfile,
    *real_sendfile64, *real_copy_file_range, *real_posix_fallocate, *real_posix_fallocate64, *real_fallocate64;

#define PASS_ON(name) return NEXT(name)(path, flags, permissions)
int open(const char *path, int flags, ...) { OPENS(open, AT_FDCWD); }
int open64(const char *path, int flags, ...) { OPENS(open64, AT_FDCWD); }
#undef PASS_ON
#define PASS_ON(name) return NEXT(name)(folder, path, flags, permissions)
int openat(int folder, const char *path, int flags, ...) { OPENS(openat, folder); }
int openat64(int folder, const char *path, int flags, ...) { OPENS(openat64, folder); }

#define WRITES(kind, call, half) \
    do { \
        int found = on_descriptor(kind, file, 1); \
        if (found > 0) { errno = found; return -1; } \
        if (found == HALF) { (void)!half; kill(owner, SIGKILL); } \
        return call; \
    } while (0)

ssize_t write(int file, const void *data, size_t size) {
    WRITES("write", NEXT(write)(file, data, size), NEXT(write)(file, data, size / 2));
}
ssize_t pwrite(int file, const void *data, size_t size, off_t where) {
    WRITES("write", NEXT(pwrite)(file, data, size, where), NEXT(pwrite)(file, data, size / 2, where));
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t where) {
    WRITES("write", NEXT(pwrite64)(file, data, size, where), NEXT(pwrite64)(file, data, size / 2, where));
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    WRITES("write", NEXT(writev)(file, parts, count), NEXT(writev)(file, parts, count / 2));
}
ssize_t sendfile(int file, int from, off_t *where, size_t size);
ssize_t sendfile64(int file, int from, off64_t *where, size_t size);
ssize_t sendfile(int file, int from, off_t *where, size_t size) {
    WRITES("write", NEXT(sendfile)(file, from, where, size), NEXT(sendfile)(file, from, where, size / 2));
}
ssize_t sendfile64(int file, int from, off64_t *where, size_t size) {
    WRITES("write", NEXT(sendfile64)(file, from, where, size), NEXT(sendfile64)(file, from, where, size / 2));
}
ssize_t copy_file_range(int from, off64_t *start, int file, off64_t *where, size_t size, unsigned flags) {
    WRITES("write", NEXT(copy_file_range)(from, start, file, where, size, flags),
           NEXT(copy_file_range)(from, start, file, where, size / 2, flags));
}

int fsync(int file) {
    REFUSE(on_descriptor("fsync", file, 1));
    return NEXT(fsync)(file);
}
int fdatasync(int file) {
    REFUSE(on_descriptor("fsync", file, 1));
    return NEXT(fdatasync)(file);
}
int ftruncate(int file, off_t size) {
    REFUSE(on_descriptor("truncate", file, 1));
    return NEXT(ftruncate)(file, size);
}
int ftruncate64(int file, off64_t size) {
    REFUSE(on_descriptor("truncate", file, 1));
    return NEXT(ftruncate64)(file, size);
}
int truncate(const char *path, off_t size) {
    REFUSE(on_path("truncate", AT_FDCWD, path, 1));
    return NEXT(truncate)(path, size);
}
int posix_fallocate(int file, off_t start, off_t size) {
    int found = on_descriptor("allocate", file, 1);
    return found > 0 ? found : NEXT(posix_fallocate)(file, start, size);
}
int posix_fallocate64(int file, off64_t start, off64_t size) {
    int found = on_descriptor("allocate", file, 1);
    return found > 0 ? found : NEXT(posix_fallocate64)(file, start, size);
}
int fallocate64(int file, int how, off64_t start, off64_t size) {
    REFUSE(on_descriptor("allocate", file, 1));
    return NEXT(fallocate64)(file, how, start, size);
}

/* A close that fails has closed all the same. */
int close(int file) {
    int found = GO;
    if (watched()) {
        int flags = fcntl(file, F_GETFL);
        if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY) found = on_descriptor("close", file, 1);
    }
    if (found == HALF) kill(owner, SIGKILL);
    int done = NEXT(close)(file);
    if (found > 0) {
        errno = found;
        return -1;
    }
    return done;
}

int rename(const char *from, const char *to) {
    REFUSE(on_path("rename", AT_FDCWD, to, 0));
    return NEXT(rename)(from, to);
}
int renameat(int folder, const char *from, int other, const char *to) {
    REFUSE(on_path("rename", other, to, 0));
    return NEXT(renameat)(folder, from, other, to);
}
int renameat2(int folder, const char *from, int other, const char *to, unsigned flags) {
    REFUSE(on_path("rename", other, to, 0));
    return NEXT(renameat2)(folder, from, other, to, flags);
}
int unlink(const char *path) {
    REFUSE(on_path("unlink", AT_FDCWD, path, 0));
    return NEXT(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REFUSE(on_path(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path, 0));
    return NEXT(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
    REFUSE(on_path("rmdir", AT_FDCWD, path, 0));
    return NEXT(rmdir)(path);
}
int mkdir(const char *path, mode_t permissions) {
    REFUSE(on_path("mkdir", AT_FDCWD, path, 1));
    return NEXT(mkdir)(path, permissions);
}
int mkdirat(int folder, const char *path, mode_t permissions) {
    REFUSE(on_path("mkdir", folder, path, 1));
    return NEXT(mkdirat)(folder, path, permissions);
}
int chmod(const char *path, mode_t permissions) {
    REFUSE(on_path("chmod", AT_FDCWD, path, 0));
    return NEXT(chmod)(path, permissions);
}
int fchmod(int file, mode_t permissions) {
    REFUSE(on_descriptor("chmod", file, 0));
    return NEXT(fchmod)(file, permissions);
}
int fchmodat(int folder, const char *path, mode_t permissions, int flags) {
    REFUSE(on_path("chmod", folder, path, 0));
    return NEXT(fchmodat)(folder, path, permissions, flags);
}
int link(const char *from, const char *to) {
    REFUSE(on_path("link", AT_FDCWD, to, 1));
    return NEXT(link)(from, to);
}
int symlink(const char *from, const char *to) {
    REFUSE(on_path("link", AT_FDCWD, to, 1));
    return NEXT(symlink)(from, to);
}
