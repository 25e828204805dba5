use strict;
use warnings;

use Errno ();
use File::Temp ();
use POSIX ();
use Test::More;

use lib 't/lib';
use CPANBridge;
use CPANBridge::SocketPath;
use FakeDaemon;

$ENV{LC_ALL} = 'C';
delete $ENV{CPAN_BRIDGE_SOCKET};
my $folder = File::Temp->newdir;

subtest 'where the daemon is looked for' => sub {
    local $ENV{CPAN_BRIDGE_SOCKET} = '/some/where';
    is_deeply([ map { $_->[0] } CPANBridge::SocketPath::candidates() ], ['/some/where'], 'what CPAN_BRIDGE_SOCKET says');
    $ENV{CPAN_BRIDGE_SOCKET} = ' /a b , ,,/c,';
    is_deeply([ map { $_->[0] } CPANBridge::SocketPath::candidates() ], [ '/a b', '/c' ], '... several paths');
    $ENV{CPAN_BRIDGE_SOCKET} = ' , ';
    ok(!grep({ $_->[0] !~ /cpanbridged/ } CPANBridge::SocketPath::candidates()), '... none is as if it were not set');
    delete $ENV{CPAN_BRIDGE_SOCKET};
    local $ENV{XDG_RUNTIME_DIR} = '/run/user/x';
    my $system = '/run/cpanbridged/cpanbridged.sock';
    is_deeply([ CPANBridge::SocketPath::candidates() ], [ [$system] ], 'root: the system path alone') if $> == 0;
    my $user = $> || 65533;
    my $as_user = sub {
        local $> = $user if $> == 0;
        return [ CPANBridge::SocketPath::candidates() ];
    };
    my $found = $as_user->();
    is_deeply(
        [ map { $_->[0] } @{$found} ],
        [ '/run/user/x/cpanbridged.sock', "/tmp/cpanbridged-$user/cpanbridged.sock", $system ],
        'a user: the three paths'
    );
    delete $ENV{XDG_RUNTIME_DIR};
    is(scalar @{ $as_user->() }, 2, '... two without XDG_RUNTIME_DIR');
};

subtest 'a folder in /tmp must be private' => sub {
    my $not_private = \&CPANBridge::SocketPath::not_private;
    mkdir "$folder/mine", 0700 or die $!;
    is($not_private->("$folder/mine"), undef, 'a private one will do');
    is($not_private->("$folder/none"), undef, 'one that is not there is for connect to tell');
    chmod 0750, "$folder/mine";
    like($not_private->("$folder/mine"), qr/others have rights/, 'others have rights');
    chmod 0700, "$folder/mine";
    symlink "$folder/mine", "$folder/link";
    like($not_private->("$folder/link"), qr/not a folder/, 'a link could be changed');
SKIP: {
        skip 'only root can give a folder away', 1 if $> != 0;
        chown 65533, -1, "$folder/mine";
        like($not_private->("$folder/mine"), qr/user 65533 owns/, "another user's");
    }
};

subtest 'a daemon that does not run is distinguished from a call that failed' => sub {
    my $bridge = CPANBridge->new(socket => "$folder/none.sock", retry_count => 0);
    my $result = $bridge->call_python('test', 'ping');
    is($result->{error_type}, 'DaemonNotRunning', 'error_type');
    like($result->{error}, qr{\Q$folder/none.sock\E: No such file or directory}, 'path and reason');
    like($result->{error}, qr/cpanbridged start/, 'what to do');
    is($bridge->get_last_error->error_type, 'DaemonNotRunning', 'get_last_error');
    ok(!$bridge->test_python_bridge, 'test_python_bridge');

    my $daemon = FakeDaemon->start(sub { });
    my $path   = $daemon->path;
    { local $daemon->{path} = "$folder/x"; $daemon->stop }
    like(CPANBridge->new(socket => $path, retry_count => 0)->call_python('a', 'b')->{error},
        qr{\Q$path\E: Connection refused}, 'a socket that was left over');
    like(CPANBridge->new(socket => '/' . 'x' x 200, retry_count => 0)->call_python('a', 'b')->{error},
        qr/too long for a socket/, 'a path that no socket can have');
};

subtest 'each path of CPAN_BRIDGE_SOCKET is tried' => sub {
    my $gone = FakeDaemon->start(sub { });
    my $left = $gone->path;
    { local $gone->{path} = "$folder/x"; $gone->stop }
    my $daemon = FakeDaemon->start(sub { $_[0]->echo });
    local $ENV{CPAN_BRIDGE_SOCKET} = "$folder/none.sock, $left, " . $daemon->path;
    my $bridge = CPANBridge->new(retry_count => 0);
    is_deeply($bridge->call_python('a', 'b', [5]), [5], 'until one answers');
    $bridge->disconnect;
    $daemon->stop;
    like($bridge->call_python('a', 'b')->{error},
        qr{none\.sock: No such file.*; \Q$left\E: Connection refused; .*: No such file}, 'or all are reported');
};

subtest 'the advice goes by the reason' => sub {
    my $daemon = FakeDaemon->start(sub { $_[0]->echo });
    chmod 0, $daemon->path;
    my $error_at = sub {
        local $ENV{CPAN_BRIDGE_SOCKET} = join ',', @_;
        local $> = 65533 if $> == 0;
        return CPANBridge->new(retry_count => 0)->call_python('a', 'b')->{error};
    };
    my $denied = $error_at->($daemon->path);
    like($denied, qr/Permission denied\)\. Ask the daemon's operator for access \(socket_mode, socket_group\)\z/,
        'no rights');
    like($error_at->($daemon->path, '/none/x'), qr/Ask .*access.*, or start one with: cpanbridged start\z/, 'both');
    like($error_at->('/none/x'), qr/\. Start it with: cpanbridged start\z/, 'not there');
    unlike($error_at->('/' . 'x' x 200), qr/Start|ask/i, 'a path that is too long');
};

subtest 'each path that was tried is reported' => sub {
    { package Elsewhere; our @ISA = ('CPANBridge'); our @paths; sub socket_paths { return @paths } }
    @Elsewhere::paths = ("$folder/one", [ "$folder/two", 'refused, because' ], "$folder/three");
    my $bridge = Elsewhere->new(retry_count => 0);
    like($bridge->call_python('a', 'b')->{error},
        qr{one: No such file.*two: refused, because; .*three: No such file}, 'all of them');
    my $daemon = FakeDaemon->start(sub { $_[0]->echo });
    $Elsewhere::paths[2] = $daemon->path;
    is_deeply($bridge->call_python('a', 'b', [5]), [5], 'the first that exists is used');
};

subtest 'retries wait for a daemon that is restarted, but not long' => sub {
    my $begin  = CPANBridge::Clock::now();
    my $bridge = CPANBridge->new(socket => "$folder/none.sock");
    is($bridge->call_python('a', 'b')->{error_type}, 'DaemonNotRunning', 'an absent daemon');
    my $took = CPANBridge::Clock::now() - $begin;
    cmp_ok($took, '>', 0.9, 'three retries take a second');
    cmp_ok($took, '<', 5,   '... or so');
    is($bridge->get_performance_stats->{retries}, 3, '... and are counted');
    $bridge->call_python('a', 'b') for 1 .. 20;
    is($bridge->get_performance_stats->{retries}, 3, 'the next calls do not wait again');

    $begin = CPANBridge::Clock::now();
    CPANBridge->new(socket => "$folder/none.sock", timeout => 0.2)->call_python('a', 'b');
    cmp_ok(CPANBridge::Clock::now() - $begin, '<', 0.9, 'never longer than the timeout');

    my $patient = CPANBridge->new(socket => "$folder/fake.sock", retry_count => 20, timeout => 30);
    defined(my $pid = fork) or die $!;
    if (!$pid) {
        CPANBridge::Clock::pause_until(CPANBridge::Clock::now() + 0.3);
        my $late = FakeDaemon->start(sub { $_[0]->echo }, folder => "$folder");
        $late->{tester} = 0;
        open my $file, '>', "$folder/pid.new" or die $!;
        print {$file} $late->{pid};
        close $file;
        rename "$folder/pid.new", "$folder/pid";
        POSIX::_exit(0);
    }
    is_deeply($patient->call_python('a', 'b', [1]), [1], 'a daemon that comes up in time is found');
    waitpid $pid, 0;
    open my $file, '<', "$folder/pid" or die $!;
    kill 'KILL', <$file>;
};

done_testing;
