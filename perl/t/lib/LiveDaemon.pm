package LiveDaemon;

# The real daemon in the foreground, as a child process, with a configuration and a folder of its own.

use strict;
use warnings;

use CPANBridge;
use CPANBridge::Clock;
use File::Temp ();
use POSIX ();

# The cpanbridged to test with: $CPANBRIDGED, or the first on the PATH; undef if there is none.
sub executable {
    for my $path ($ENV{CPANBRIDGED}, map { "$_/cpanbridged" } split /:/, $ENV{PATH} || '') {
        return $path if defined $path && -f $path && -x _;
    }
    return undef;
}

# `helpers` has the Python code of modules by their names; `-limits` the configuration's limits.
sub start {
    my ($class, %helpers) = @_;
    my $limits = delete $helpers{-limits} || 'max_requests_per_minute = 0';
    my $folder = File::Temp->newdir;
    my $self = bless { folder => $folder, path => "$folder/d.sock", tester => $$ }, $class;
    mkdir "$folder/helpers" or die $!;
    $self->_write("helpers/$_.py", $helpers{$_}) for keys %helpers;
    $self->_write('config.toml', <<"END");
listen = ["$self->{path}"]
workers = 2
[limits]
$limits
[modules.stats]
import = "statistics"
functions = ["mean", "stdev"]
[[module_dirs]]
path = "$folder/helpers"
functions = "*"
END
    $self->run;
    return $self;
}

sub _write {
    my ($self, $name, $text) = @_;
    open my $file, '>', "$self->{folder}/$name" or die "$name: $!";
    print {$file} $text;
    close $file or die $!;
    return;
}

# Starts the daemon and returns when it answers.
sub run {
    my ($self) = @_;
    defined($self->{pid} = fork) or die $!;
    if (!$self->{pid}) {
        delete @ENV{ grep { /\ACPAN_BRIDGE_/ } keys %ENV };
        open STDOUT, '>>', "$self->{folder}/log";
        open STDERR, '>&', \*STDOUT;
        exec { executable() } 'cpanbridged', 'run', '--config', "$self->{folder}/config.toml"
            or POSIX::_exit(127);
    }
    my $until = CPANBridge::Clock::now() + 60;
    while (CPANBridge::Clock::now() < $until) {
        return if $self->bridge(retry_count => 0)->test_python_bridge;
        die "The daemon has ended:\n", $self->log if waitpid($self->{pid}, POSIX::WNOHANG()) == $self->{pid};
        CPANBridge::Clock::pause_until(CPANBridge::Clock::now() + 0.05);
    }
    die "The daemon does not answer:\n", $self->log;
}

sub log {
    my ($self) = @_;
    open my $log, '<', "$self->{folder}/log" or return "(no log)\n";
    return join '', <$log>;
}

sub folder { return "$_[0]{folder}" }
sub path   { return $_[0]{path} }
sub pid    { return $_[0]{pid} }

sub bridge {
    my ($self, %options) = @_;
    return CPANBridge->new(socket => $self->{path}, timeout => 30, %options);
}

sub stop {
    my ($self) = @_;
    my $pid = delete $self->{pid} or return;
    local $?;
    kill 'TERM', $pid;
    my $until = CPANBridge::Clock::now() + 30;
    while (waitpid($pid, POSIX::WNOHANG()) == 0) {
        kill 'KILL', $pid if CPANBridge::Clock::now() > $until;
        CPANBridge::Clock::pause_until(CPANBridge::Clock::now() + 0.02);
    }
    return;
}

sub CLONE_SKIP { return 1 }

sub DESTROY {
    my ($self) = @_;
    $self->stop if $self->{tester} == $$;
    return;
}

1;
