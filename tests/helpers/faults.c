// Preloaded into a pruner by the tests: at chosen system calls it is killed, stopped or told that the disk is full.
// Only calls on files below the folders of `under` count, so that Python's own start is left alone.
//
//   under   folders, joined by ':'
//   rules   CALL[@PART OF PATH]:N[+]:ACTION, joined by ','. The rule acts at the N-th call that fits it; with '+' from
//           then on. CALL is a name of kNames, or "change" for every call that changes a file or a folder.
//   ACTION  an errno (EIO, ENOSPC, EINTR, ...): the call is not made and fails; SHORT: half of the bytes are asked for;
//           KILL: SIGKILL before the call; TORN: SIGKILL after half of its bytes; STOP, INT, TERM: that signal, then
//           the call
//   log     a file that gets one line "CALL PATH" for every call that counts, in their order
//
// They come from the environment (MOEKERN_FAULT_UNDER, _RULES, _LOG), or from moekern_faults() after a fork.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, WRITE, FSYNC, RENAME, MKDIR, UNLINK, RMDIR, TRUNCATE, FALLOCATE, COPY, CLONE, READ, LSEEK, HINT, LOCK };
enum { LAST_CHANGE = CLONE };
static const char* const kNames[] = {"open",     "write",     "fsync", "rename", "mkdir", "unlink", "rmdir",
                                     "truncate", "fallocate", "copy",  "clone",  "read",  "lseek",  "hint", "lock"};
enum { KILL = -1, TORN = -2, SHORT = -3, STOP = -4, INT = -5, TERM = -6 };  // actions; others are an errno
static const struct { const char* name; int action; } kActions[] = {
    {"KILL", KILL},     {"TORN", TORN},     {"SHORT", SHORT},   {"STOP", STOP},     {"INT", INT},
    {"TERM", TERM},     {"EIO", EIO},       {"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT}, {"EINTR", EINTR},
    {"EROFS", EROFS},   {"EACCES", EACCES}, {"EXDEV", EXDEV},   {"EINVAL", EINVAL}, {"EOPNOTSUPP", EOPNOTSUPP},
    {"ENOSYS", ENOSYS}, {"EMFILE", EMFILE}, {"ENOLCK", ENOLCK}, {"ESTALE", ESTALE}, {"ENOMEM", ENOMEM}};

typedef struct { char call[16], part[128]; long at, seen; int onwards, action; } Rule;
static Rule rules[16];
static int rule_count;
static char under[4096], log_path[PATH_MAX];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void copy_text(char* to, size_t size, const char* from) { snprintf(to, size, "%s", from ? from : ""); }

static void parse_rule(const char* text) {
  Rule* rule = &rules[rule_count];
  char name[64], number[32], action[32];
  memset(rule, 0, sizeof *rule);
  if (sscanf(text, "%63[^:]:%31[^:]:%31s", name, number, action) != 3) abort();
  char* part = strchr(name, '@');
  if (part) *part++ = 0;
  copy_text(rule->call, sizeof rule->call, name);
  copy_text(rule->part, sizeof rule->part, part);
  rule->at = strtol(number, NULL, 10);
  rule->onwards = strchr(number, '+') != NULL;
  for (size_t i = 0; i < sizeof kActions / sizeof *kActions; ++i)
    if (strcmp(kActions[i].name, action) == 0) rule->action = kActions[i].action;
  if (rule->action == 0 || rule->at < 1 || ++rule_count == 16) abort();
}

void moekern_faults(const char* folders, const char* text, const char* log) {
  char copy[2048], *rest = copy;
  copy_text(under, sizeof under, folders);
  copy_text(log_path, sizeof log_path, log);
  copy_text(copy, sizeof copy, text);
  rule_count = 0;
  for (char* one; (one = strsep(&rest, ",")) != NULL;)
    if (*one) parse_rule(one);
}

__attribute__((constructor)) static void from_environment(void) {
  moekern_faults(getenv("MOEKERN_FAULT_UNDER"), getenv("MOEKERN_FAULT_RULES"), getenv("MOEKERN_FAULT_LOG"));
}

static int counts(const char* path) {
  for (const char *folder = under, *end; *folder; folder = *end ? end + 1 : end) {
    end = strchrnul(folder, ':');
    const size_t length = (size_t)(end - folder);
    if (strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0)) return 1;
  }
  return 0;
}

static void path_of(int fd, char* path) {
  char link[32];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = 0;
}

static void absolute(int folder, const char* name, char* path) {
  char start[PATH_MAX] = "";
  if (name[0] != '/' && folder == AT_FDCWD && !getcwd(start, sizeof start)) start[0] = 0;
  if (name[0] != '/' && folder != AT_FDCWD) path_of(folder, start);
  if ((size_t)snprintf(path, PATH_MAX, "%s%s%s", start, name[0] == '/' ? "" : "/", name) >= PATH_MAX) path[0] = 0;
}

static void note(int call, const char* path) {
  char line[2 * PATH_MAX + 32];
  const int length = snprintf(line, sizeof line, "%s %s\n", kNames[call], path);
  const int fd = (int)syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (syscall(SYS_write, fd, line, (size_t)length) != length) abort();
  syscall(SYS_close, fd);
}

static int fits(const Rule* rule, int call, const char* path) {
  const int change = call <= LAST_CHANGE && strcmp(rule->call, "change") == 0;
  return (change || strcmp(rule->call, kNames[call]) == 0) && strstr(path, rule->part) != NULL;
}

// 0: make the call as it is; TORN or SHORT: with half of its bytes; -1 and errno set where the call is to fail.
static int fate(int call, const char* path, int* error) {
  *error = 0;
  if (!under[0] || !counts(path)) return 0;
  const int before = errno;
  int result = 0, stop = 0, signal_number = 0;
  pthread_mutex_lock(&mutex);
  if (log_path[0]) note(call, path);
  for (int i = 0; i < rule_count; ++i) {
    Rule* rule = &rules[i];
    if (!fits(rule, call, path)) continue;
    ++rule->seen;
    if (rule->seen != rule->at && !(rule->onwards && rule->seen > rule->at)) continue;
    if (rule->action == KILL) kill(getpid(), SIGKILL);
    if (rule->action == STOP) stop = 1;
    if (rule->action == INT) signal_number = SIGINT;
    if (rule->action == TERM) signal_number = SIGTERM;
    if (rule->action == TORN || rule->action == SHORT) result = rule->action;
    if (rule->action > 0) *error = rule->action;
  }
  pthread_mutex_unlock(&mutex);
  if (stop) syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGSTOP);  // to this thread: it goes no further
  if (signal_number) kill(getpid(), signal_number);
  errno = before;
  return result;
}

static long failed(int error) {
  errno = error;
  return -1;
}

static size_t half(size_t bytes) { return bytes > 1 ? bytes / 2 : bytes; }

// A call that moves no bytes; TORN kills before it.
#define PLAIN(call, path, made)                         \
  do {                                                  \
    int error_;                                         \
    if (fate(call, path, &error_) == TORN) raise(SIGKILL); \
    return error_ ? failed(error_) : (made);            \
  } while (0)

// A call that moves `bytes` bytes of file `fd`; `made` uses `n_`, the bytes to ask for.
#define MOVING(call, fd, bytes, made)                   \
  do {                                                  \
    char path_[PATH_MAX];                               \
    path_of(fd, path_);                                 \
    int error_;                                         \
    const int how_ = fate(call, path_, &error_);        \
    if (error_) return failed(error_);                  \
    const size_t n_ = how_ ? half(bytes) : (size_t)(bytes); \
    const ssize_t done_ = (ssize_t)(made);              \
    if (how_ == TORN) kill(getpid(), SIGKILL);          \
    return done_;                                       \
  } while (0)

static long open_at(int folder, const char* name, int flags, mode_t mode) {
  char path[PATH_MAX];
  absolute(folder, name, path);
  if ((flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT)) return syscall(SYS_openat, folder, name, flags, mode);
  PLAIN(OPEN, path, syscall(SYS_openat, folder, name, flags, mode));
}

#define MODE(flags, mode)                                      \
  mode_t mode = 0;                                             \
  if ((flags) & (O_CREAT | __O_TMPFILE)) {                     \
    va_list more;                                              \
    va_start(more, flags);                                     \
    mode = va_arg(more, mode_t);                               \
    va_end(more);                                              \
  }

int open(const char* name, int flags, ...) { MODE(flags, mode) return (int)open_at(AT_FDCWD, name, flags, mode); }
int open64(const char* name, int flags, ...) { MODE(flags, mode) return (int)open_at(AT_FDCWD, name, flags, mode); }
int openat(int at, const char* name, int flags, ...) { MODE(flags, mode) return (int)open_at(at, name, flags, mode); }
int openat64(int at, const char* name, int flags, ...) { MODE(flags, mode) return (int)open_at(at, name, flags, mode); }
int creat(const char* name, mode_t mode) { return (int)open_at(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

ssize_t read(int fd, void* to, size_t n) { MOVING(READ, fd, n, syscall(SYS_read, fd, to, n_)); }
ssize_t pread(int fd, void* to, size_t n, off_t at) { MOVING(READ, fd, n, syscall(SYS_pread64, fd, to, n_, at)); }
ssize_t pread64(int fd, void* to, size_t n, off64_t at) { return pread(fd, to, n, at); }
ssize_t write(int fd, const void* from, size_t n) { MOVING(WRITE, fd, n, syscall(SYS_write, fd, from, n_)); }
ssize_t pwrite(int fd, const void* from, size_t n, off_t at) {
  MOVING(WRITE, fd, n, syscall(SYS_pwrite64, fd, from, n_, at));
}
ssize_t pwrite64(int fd, const void* from, size_t n, off64_t at) { return pwrite(fd, from, n, at); }

// Half of a vector: half of its first part alone.
static struct iovec first(const struct iovec* parts, int count, int how, int* left) {
  *left = how ? 1 : count;
  return (struct iovec){parts[0].iov_base, how ? half(parts[0].iov_len) : parts[0].iov_len};
}

static ssize_t vector(int call, long number, int fd, const struct iovec* parts, int count, off_t at) {
  char path[PATH_MAX];
  int error, left;
  path_of(fd, path);
  const int how = fate(call, path, &error);
  if (error) return failed(error);
  const struct iovec one = first(parts, count, how, &left);
  const ssize_t done = syscall(number, fd, how ? &one : parts, left, at, 0L);
  if (how == TORN) kill(getpid(), SIGKILL);
  return done;
}

ssize_t readv(int fd, const struct iovec* parts, int count) { return vector(READ, SYS_readv, fd, parts, count, 0); }
ssize_t writev(int fd, const struct iovec* parts, int count) { return vector(WRITE, SYS_writev, fd, parts, count, 0); }
ssize_t preadv(int fd, const struct iovec* parts, int count, off_t at) {
  return vector(READ, SYS_preadv, fd, parts, count, at);
}
ssize_t preadv64(int fd, const struct iovec* parts, int count, off64_t at) { return preadv(fd, parts, count, at); }
ssize_t pwritev(int fd, const struct iovec* parts, int count, off_t at) {
  return vector(WRITE, SYS_pwritev, fd, parts, count, at);
}
ssize_t pwritev64(int fd, const struct iovec* parts, int count, off64_t at) { return pwritev(fd, parts, count, at); }

ssize_t copy_file_range(int from, off64_t* at, int to, off64_t* to_at, size_t n, unsigned flags) {
  MOVING(COPY, to, n, syscall(SYS_copy_file_range, from, at, to, to_at, n_, flags));
}
ssize_t sendfile(int to, int from, off_t* at, size_t n) {
  MOVING(WRITE, to, n, syscall(SYS_sendfile, to, from, at, n_));
}
ssize_t sendfile64(int to, int from, off64_t* at, size_t n) { return sendfile(to, from, at, n); }

static long plain_fd(int call, int fd, long number, long a, long b, long c) {
  char path[PATH_MAX];
  path_of(fd, path);
  PLAIN(call, path, syscall(number, fd, a, b, c));
}

int fsync(int fd) { return (int)plain_fd(FSYNC, fd, SYS_fsync, 0, 0, 0); }
int fdatasync(int fd) { return (int)plain_fd(FSYNC, fd, SYS_fdatasync, 0, 0, 0); }
int syncfs(int fd) { return (int)plain_fd(FSYNC, fd, SYS_syncfs, 0, 0, 0); }
int ftruncate(int fd, off_t length) { return (int)plain_fd(TRUNCATE, fd, SYS_ftruncate, length, 0, 0); }
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }
int fallocate(int fd, int mode, off_t at, off_t n) { return (int)plain_fd(FALLOCATE, fd, SYS_fallocate, mode, at, n); }
int fallocate64(int fd, int mode, off64_t at, off64_t n) { return fallocate(fd, mode, at, n); }
int posix_fallocate(int fd, off_t at, off_t n) { return fallocate(fd, 0, at, n) == 0 ? 0 : errno; }
int posix_fallocate64(int fd, off64_t at, off64_t n) { return posix_fallocate(fd, at, n); }
off_t lseek(int fd, off_t at, int whence) { return plain_fd(LSEEK, fd, SYS_lseek, at, whence, 0); }
off64_t lseek64(int fd, off64_t at, int whence) { return lseek(fd, at, whence); }
int sync_file_range(int fd, off64_t at, off64_t n, unsigned flags) {
  return (int)plain_fd(HINT, fd, SYS_sync_file_range, at, n, (long)flags);
}
int flock(int fd, int operation) { return (int)plain_fd(LOCK, fd, SYS_flock, operation, 0, 0); }

int ioctl(int fd, unsigned long request, ...) {
  va_list more;
  va_start(more, request);
  void* argument = va_arg(more, void*);
  va_end(more);
  if (request != FICLONERANGE && request != FICLONE) return (int)syscall(SYS_ioctl, fd, request, argument);
  char path[PATH_MAX];
  path_of(fd, path);
  PLAIN(CLONE, path, (int)syscall(SYS_ioctl, fd, request, argument));
}

static long rename_at(int at, const char* name, int to, const char* other, unsigned flags) {
  char both[2 * PATH_MAX + 4] = "";
  absolute(at, name, both);
  const size_t length = strlen(both);
  memcpy(both + length, " -> ", 4);
  absolute(to, other, both + length + 4);
  PLAIN(RENAME, both, syscall(SYS_renameat2, at, name, to, other, flags));
}

int rename(const char* name, const char* other) { return (int)rename_at(AT_FDCWD, name, AT_FDCWD, other, 0); }
int renameat(int at, const char* name, int to, const char* other) { return (int)rename_at(at, name, to, other, 0); }
int renameat2(int at, const char* name, int to, const char* other, unsigned flags) {
  return (int)rename_at(at, name, to, other, flags);
}

static long named(int call, int at, const char* name, long number, long flags) {
  char path[PATH_MAX];
  absolute(at, name, path);
  PLAIN(call, path, syscall(number, at, name, flags));
}

int mkdir(const char* name, mode_t mode) { return (int)named(MKDIR, AT_FDCWD, name, SYS_mkdirat, (long)mode); }
int mkdirat(int at, const char* name, mode_t mode) { return (int)named(MKDIR, at, name, SYS_mkdirat, (long)mode); }
int unlink(const char* name) { return (int)named(UNLINK, AT_FDCWD, name, SYS_unlinkat, 0); }
int unlinkat(int at, const char* name, int flags) {
  return (int)named(flags & AT_REMOVEDIR ? RMDIR : UNLINK, at, name, SYS_unlinkat, flags);
}
int rmdir(const char* name) { return (int)named(RMDIR, AT_FDCWD, name, SYS_unlinkat, AT_REMOVEDIR); }
