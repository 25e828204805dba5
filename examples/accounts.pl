#!/usr/bin/env perl
# A transaction and a report on a SQLite database, by a script that has neither DBI nor a driver: its
# connection and its statements stand in the daemon, and are found again by each call.
#
#   accounts.pl [--one-shot] DATABASE
#
# With --one-shot each call has a connection to the daemon of its own, as older clients do it; the
# state is found all the same, because the daemon knows the process.
use 5.010;
use strict;
use warnings;

use FindBin;
use Getopt::Long qw(GetOptions);
use IO::Socket::UNIX;
use lib "$FindBin::Bin/../perl/lib";
use CPANBridge;
use CPANBridge::JSON;

my $USAGE = "Usage: perl $0 [--one-shot] DATABASE\n";
my $one_shot;
GetOptions('one-shot' => \$one_shot) && @ARGV == 1 or do { print {*STDERR} $USAGE; exit 2 };

my $bridge = CPANBridge->new;
my $db = database('connect', $ARGV[0]);

run('CREATE TABLE IF NOT EXISTS accounts (owner TEXT PRIMARY KEY, cents INTEGER NOT NULL)');
for ([ 'Ann', 100_00 ], [ "J\x{fc}rg", 20_00 ]) {
    run('INSERT OR REPLACE INTO accounts VALUES (?, ?)', @{$_});
}
database('commit', $db);

# A transfer is done as a whole or not at all.
transfer("J\x{fc}rg", 'Ann', 12_50);
eval { transfer("J\x{fc}rg", 'Ann', 99_00); 1 } or print "refused: $@";

binmode STDOUT, ':encoding(UTF-8)';
my $rows = run('SELECT owner, cents FROM accounts ORDER BY owner');
printf "%-6s %8.2f\n", $_->{owner}, $_->{cents} / 100 for @{ database('fetch', $rows) };
database('disconnect', $db);

sub transfer {
    my ($from, $to, $cents) = @_;
    run('UPDATE accounts SET cents = cents - ? WHERE owner = ?', $cents, $from);
    run('UPDATE accounts SET cents = cents + ? WHERE owner = ?', $cents, $to);
    my $left = run('SELECT cents FROM accounts WHERE owner = ?', $from);
    if (database('fetch', $left)->[0]{cents} < 0) {
        database('rollback', $db);
        die "not enough money\n";
    }
    return database('commit', $db);
}

# Run a statement; its handle.
sub run {
    my ($sql, @values) = @_;
    my $statement = database('prepare', $db, $sql);
    database('execute', $statement, \@values);
    return $statement;
}

sub database {
    my ($function, @params) = @_;
    return $bridge->call('database', $function, \@params) if !$one_shot;
    my ($path) = grep { -S } map { ref $_ ? $_->[0] : $_ } $bridge->socket_paths;
    my $socket = IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $path) or die "$path: $!\n";
    print {$socket} CPANBridge::JSON::encode(
        { module => 'database', function => $function, params => \@params });
    my $reply = CPANBridge::JSON::decode(do { local $/ = undef; readline $socket });
    die "$reply->{error}\n" if !$reply->{success};
    return $reply->{result};
}
